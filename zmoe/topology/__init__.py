"""What this process may use of its machine: cores, their sockets, and containers' limits.

Everything is read from files of the system under a root folder, which tests make up.
"""
