"""What people see: progress and tables on the terminal, and the pictures."""
