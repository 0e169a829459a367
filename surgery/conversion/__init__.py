"""An original in, a twin and its report out: `surgery inspect` and `surgery convert`."""
