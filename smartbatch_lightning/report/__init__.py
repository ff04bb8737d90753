"""What padding costs: numbers, tables, figures."""
