"""What can be done with runs: `python -m train VERB` calls `main(arguments)` of the file of that name."""
