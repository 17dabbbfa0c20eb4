# SPDX-License-Identifier: Apache-2.0
"""The original system's MongoDB collections and their JSON export."""
