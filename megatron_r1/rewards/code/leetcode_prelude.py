"""What LeetCode has imported and defined before a solution runs. Executed inside the sandbox; imported by nobody."""

# ruff: noqa

import bisect
import collections
import copy
import datetime
import functools
import heapq
import itertools
import math
import operator
import random
import re
import string
import sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from string import *
from typing import *

from builtins import pow  # the star imports of math and operator put others over it

inf = float("inf")


class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next


class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val = val
        self.left = left
        self.right = right


def list_node(values):
    """A linked list with these values."""
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head


def tree_node(values):
    """A tree from its values level by level, None for a missing child."""
    if not values:
        return None
    rest = iter(values)
    root = TreeNode(next(rest))
    row = collections.deque([root])
    while row:
        node = row.popleft()
        for side in ("left", "right"):
            value = next(rest, None)
            if value is not None:
                setattr(node, side, TreeNode(value))
                row.append(getattr(node, side))
    return root
