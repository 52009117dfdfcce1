"""What people see of a compression: a table in the terminal, files to keep, a plot to look at."""
