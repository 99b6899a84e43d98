"""Writing a prestacked store."""
