"""What the tests of reading share."""

TEXT = {"tokens": 1024, "window": 32}
