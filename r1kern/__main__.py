"""`python -m r1kern`, as torchrun starts it."""

# Saving a checkpoint spawns a process that imports this module again: keep the guard.
if __name__ == "__main__":
    from r1kern.cli import main

    main()
