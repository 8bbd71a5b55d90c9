"""The parts behind `backend.memory_management`: pure decisions (states, budgets, eviction, placement) and the store that carries them out."""
