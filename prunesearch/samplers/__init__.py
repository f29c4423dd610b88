"""Who proposes candidates, and what each of them is told."""
