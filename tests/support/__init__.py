"""What the tests share beside `budget.py` and `models.py`: backends, tiers, the library's inside."""
