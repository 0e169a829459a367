"""What the machine is: processes, weights and hidden states on disk, files, progress. It knows no architecture."""
