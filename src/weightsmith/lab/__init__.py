"""The experiment engine: arms x seeds as independent jobs, their records, and the report. It knows no technique."""
