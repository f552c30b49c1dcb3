"""The batch runtime: jobs, their results and the journal; knows no terminal and no command line."""
