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
	build := exec.Command("go", "build", "-o", binary, "tidemark/cmd/tidemark")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	code := 1
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build tidemark:", err)
	} else {
		code = m.Run()
	}
	tellSkipped()
	if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// A result that go test remembers is of the sources as they are: a test looks at
// every one of them, as go test only notices what tests look at.
func TestRememberedResultsAreOfTheseSources(t *testing.T) {
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == ".git" {
			return filepath.SkipDir
		}
		if err == nil && strings.HasSuffix(path, ".go") {
			_, err = os.Stat(path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

var skipped struct {
	sync.Mutex
	stories []string
}

// tellSkipped says which stories were skipped where somebody reads it: go test
// shows nothing of a package that passes, so this goes to go test's own standard
// error where the system lets us, else to the terminal, else to ours.
func tellSkipped() {
	skipped.Lock()
	defer skipped.Unlock()
	if len(skipped.stories) == 0 {
		return
	}
	out := os.Stderr
	for _, loud := range []string{fmt.Sprintf("/proc/%d/fd/2", os.Getppid()), "/dev/tty"} {
		if f, err := os.OpenFile(loud, os.O_WRONLY|os.O_APPEND, 0); err == nil {
			defer f.Close()
			out = f
			break
		}
	}
	for _, s := range skipped.stories {
		fmt.Fprintln(out, "SKIPPED", s)
	}
	fmt.Fprintf(out, "%d stories were SKIPPED for want of programs; TIDEMARK_E2E=require makes that a failure\n", len(skipped.stories))
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
