"""The paper's figures, one study each: configuration → tidy tables → figures and findings."""
