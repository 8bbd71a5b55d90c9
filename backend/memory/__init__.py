"""Pure parts under `backend.memory_management`: states, budgets, eviction, placement; and the store that carries them out."""
