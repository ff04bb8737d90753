"""The cost of padding: numbers, tables, figures."""
