"""What the rows are turned into: targets, tables, figures. Imports no torch."""
