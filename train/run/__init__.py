"""What a run is on disk: its folder, who holds it, what it is made of by hash, and where it came from."""
