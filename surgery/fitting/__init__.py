"""One block's arrivals in, its polynomial and how good it is out; of a mixture, one for each expert."""
