"""How answers are decoded: one file per method, named as conf/decoding has it."""
