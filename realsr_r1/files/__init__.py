"""Files and the command line: `realsr restore`, and what all commands share."""
