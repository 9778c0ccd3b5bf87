"""Images as PIL and arrays: conversion to RGB, Canny edges, condition images, masks, contact sheets."""
