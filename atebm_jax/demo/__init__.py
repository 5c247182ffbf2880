"""A page to play with: sample, explain, edit, attack, and read energies."""
