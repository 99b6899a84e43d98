"""Kills, stops and cuts at any moment: the text must be the one that comes without them."""
