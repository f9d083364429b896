"""The commands: `python -m train.main`, `python -m train.evaluate`, `python -m train.predict`."""
