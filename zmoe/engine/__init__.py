"""One forward pass at a time, and the loop that turns passes into text."""
