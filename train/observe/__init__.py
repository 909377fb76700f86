"""What a run shows while it trains: its record, its pace, how much of the cards it uses."""
