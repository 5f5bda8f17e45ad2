"""Looking at runs, alone and side by side."""
