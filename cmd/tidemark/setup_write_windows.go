package main

import (
	"io/fs"
	"os"
)

// The clients that setup knows are configured on other systems; on this one it
// prints, and writes images of theirs.

func takeOwner(*os.File, fs.FileInfo) error { return nil }

func syncDir(string) error { return nil }
