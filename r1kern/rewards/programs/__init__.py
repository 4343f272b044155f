"""Programs under test: the sandbox, what runs in it, the forms that tests come in."""
