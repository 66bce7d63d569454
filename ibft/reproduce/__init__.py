"""The paper's experiments end to end, and what is made of them: scores over seeds, claims, a page."""
