// Package e2e tells stories with the real binary and real clients.
//
// What needs a program that is not there is skipped and says so at the end;
// with TIDEMARK_E2E=require it fails instead.
package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// binary is tidemark, built once for all stories.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "tidemark-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary = filepath.Join(dir, "tidemark")
	if err := watchSources(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	build := exec.Command("go", "build", "-o", binary, "tidemark/cmd/tidemark")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	code := 1
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build tidemark:", err)
	} else {
		code = m.Run()
	}
	skipped.Lock()
	for _, s := range skipped.stories {
		fmt.Fprintln(os.Stderr, "SKIPPED", s)
	}
	if n := len(skipped.stories); n > 0 {
		fmt.Fprintf(os.Stderr, "%d stories were SKIPPED for want of programs; TIDEMARK_E2E=require makes that a failure\n", n)
	}
	skipped.Unlock()
	if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// watchSources looks at every source file, so that go test does not take the
// result of a binary built from older ones for that of this one.
func watchSources() error {
	return filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == ".git" {
			return filepath.SkipDir
		}
		if err == nil && strings.HasSuffix(path, ".go") {
			_, err = os.Stat(path)
		}
		return err
	})
}

var skipped struct {
	sync.Mutex
	stories []string
}

// need returns the path of a program, under any of its names, or skips the
// story, loudly.
func need(t *testing.T, names ...string) string {
	t.Helper()
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	skip(t, "no "+strings.Join(names, " or ")+" on this machine")
	return ""
}

func skip(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("TIDEMARK_E2E") == "require" {
		t.Fatalf("required by TIDEMARK_E2E: %s", why)
	}
	skipped.Lock()
	skipped.stories = append(skipped.stories, t.Name()+": "+why)
	skipped.Unlock()
	t.Skip(why)
}
