"""Drawing: contact sheets and sample images."""
