# SPDX-License-Identifier: Apache-2.0
"""What is computed: the networks, their weights, checkpoints and inference."""
