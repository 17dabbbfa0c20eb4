# SPDX-License-Identifier: Apache-2.0
"""The MongoDB collections of the original system, and their JSON export."""
