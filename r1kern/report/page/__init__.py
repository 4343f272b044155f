"""The pieces of a run's page: reading what a folder holds, drawing it, laying it out."""
