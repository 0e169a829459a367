"""How texts of many kinds begin, for a model to go on: what it writes from its start token alone is of few kinds."""

from __future__ import annotations

from typing import Any

OPENINGS = (
    "The history of the region begins with the first settlements along the river",
    "Born in 1874 in a small town near the coast, she was the third",
    "The species is found in dry forests and grassland, at altitudes",
    "The old house stood at the end of the lane, and nobody had",
    "\"I never said that,\" he answered, and put down his hat.",
    "Once upon a time there lived a miller who had three daughters and",
    "It was raining when the train came into the station, and I",
    "ACT I. SCENE II. A room in the castle. Enter the",
    "KING. What news from the north? MESSENGER. My lord, the",
    "O western wind, that over hill and sea dost carry all the",
    "The moon was low upon the water,\nAnd all the boats were still;\n",
    "Fellow citizens, we are met here today to consider the state of our",
    "Mr. Speaker, I rise to support the motion before the House, which",
    "Dear Sir, I have received your letter of the fourth of this month and",
    "Usage: backup [OPTION]... SOURCE DEST\nCopy files from SOURCE to",
    "To install the package, first make sure that the following libraries are",
    "The function returns a new list. If the argument is missing, the default value",
    "import os\nimport sys\nfrom pathlib import Path\n\n\ndef main(",
    "class Graph:\n    def __init__(self, nodes, edges):\n        self.",
    "def read_table(path, delimiter=\",\"):\n    \"\"\"Read a table from a file",
    "#include <stdio.h>\n#include <stdlib.h>\n\nint main(int argc, char",
    "function render(items) {\n  const list = document.getElementById(\"list\");\n",
    "SELECT name, COUNT(*) FROM orders JOIN customers ON orders.customer_id",
    "{\n  \"name\": \"example\",\n  \"version\": \"1.0.2\",\n  \"dependencies\": {",
    "<html>\n<head>\n<title>Welcome to our home page</title>",
    "Q: How do I remove rust from a cast iron pan? A:",
    "How can I sort a dictionary by its values? I have tried the following, but",
    "User: Can you explain what a black hole is? Assistant: Of course",
    "<alice> has anyone got the new driver to work? <bob> not yet,",
    "Abstract. We study the convergence of a class of iterative methods for",
    "Theorem 2. Let f be a continuous function on the closed interval [a, b",
    "Patients were randomly assigned to receive either the drug or placebo, and the primary",
    "Chapter 5: Photosynthesis. Plants turn the energy of sunlight into",
    "The court held that the defendant's motion should be denied, because the",
    "Section 12. (a) No person shall operate a vehicle on a public",
    "LONDON - The government said on Tuesday that it would raise taxes on",
    "The home side won 3-1 on Saturday, with two goals in the second",
    "Ingredients: 2 cups flour, 1 teaspoon salt, 3 eggs,",
    "I bought this camera two weeks ago, and so far I am quite",
    "Shares of the company fell 4 percent after it reported quarterly",
    "And it came to pass in those days that the people of the land",
    "There are three reasons why this view is mistaken. First, it",
    "Problem: A train travels 120 miles in 2 hours. Solution:",
    "Today we went down to the harbour, and father showed us the",
    "1. Introduction\n2. Related work\n3. Method\n4.",
    "Thank you all for coming. Tonight I want to talk about something that",
    "The first thing you notice in the painting is the light, which falls",
    "- [ ] Fix the login page\n- [x] Update the",
)  # fmt: skip


def openings(tokenizer: Any) -> list[list[int]]:
    """Their ids, all of the length of the shortest: rows that are drawn together begin alike."""
    rows = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in OPENINGS]
    length = min(map(len, rows))
    return [row[:length] for row in rows]
