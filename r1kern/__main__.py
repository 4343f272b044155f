"""`python -m r1kern`, as torchrun starts it."""

if __name__ == "__main__":
    from r1kern.cli import main

    main()
