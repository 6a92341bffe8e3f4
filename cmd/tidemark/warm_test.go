package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
)

// run runs a client command against a server that answers with some lines.
func runAgainst(t *testing.T, answer func(w http.ResponseWriter), args ...string) (out, errs string, code int) {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { answer(w) }))
	defer srv.Close()
	root := newRoot()
	var stdout, stderr bytes.Buffer
	root.SetOut(&stdout)
	root.SetErr(&stderr)
	root.SetArgs(append(args, "--server", srv.URL))
	err := root.ExecuteContext(t.Context())
	var ee *exitError
	switch {
	case errors.As(err, &ee):
		code = ee.code
	case err != nil:
		code = exitFailed
	}
	if err != nil {
		fmt.Fprintln(&stderr, err)
	}
	return stdout.String(), stderr.String(), code
}

func lines(text ...string) func(http.ResponseWriter) {
	return func(w http.ResponseWriter) { fmt.Fprintln(w, strings.Join(text, "\n")) }
}

const (
	warmHave = `{"ref":"docker.io/library/app:1","have":1,"total":2}`
	warmDone = `{"ref":"docker.io/library/app:1","digest":"sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","have":2,"total":2,"done":true,"filled":1,"bytes":2048,"platforms":[{"platform":"linux/amd64","complete":true,"bytes":4096,"missing":[]}]}`
	warmLost = `{"ref":"docker.io/library/gone:1","have":0,"total":0,"done":true,"error":"upstream says 404"}`
)

// A warming ends with what is complete, and its exit code says whether all is; an answer
// that is cut off is never taken for one that is complete.
func TestWarmTells(t *testing.T) {
	for name, tt := range map[string]struct {
		answer       func(http.ResponseWriter)
		code         int
		stdout, errs string
	}{
		"complete":            {lines(warmHave, warmDone, `{"done":true,"complete":true,"filled":1,"bytes":2048,"failed":[]}`), 0, "linux/amd64  4 KiB  nothing", "fetched 2 KiB"},
		"one is missing":      {lines(warmHave, warmDone, warmLost, `{"done":true,"complete":false,"filled":1,"bytes":2048,"failed":[{"ref":"docker.io/library/gone:1","error":"upstream says 404"}]}`), 1, "upstream says 404", "1 of 2 images are not complete"},
		"cut off":             {lines(warmHave, warmDone), 1, "", "ended in the middle"},
		"cut off in a line":   {func(w http.ResponseWriter) { fmt.Fprint(w, warmHave+"\n"+warmDone[:20]) }, 1, "", "ended in the middle"},
		"an error in the end": {lines(warmHave, `{"error":{"code":"internal","message":"the disk is gone"}}`), 1, "", "the disk is gone"},
		"an error at once": {func(w http.ResponseWriter) {
			w.WriteHeader(400)
			fmt.Fprint(w, `{"error":{"code":"bad_request","message":"platforms: no"}}`)
		}, 1, "", "platforms: no"},
		"nothing at all": {func(http.ResponseWriter) {}, 1, "", "ended in the middle"},
	} {
		t.Run(name, func(t *testing.T) {
			out, errs, code := runAgainst(t, tt.answer, "warm", "app:1", "gone:1")
			if code != tt.code || !strings.Contains(out, tt.stdout) || !strings.Contains(errs, tt.errs) {
				t.Errorf("exit %d\n%s\n%s\nwant %d, %q, %q", code, out, errs, tt.code, tt.stdout, tt.errs)
			}
			if strings.Contains(errs, "\r") {
				t.Error("what is no terminal gets its cursor moved")
			}
		})
	}
}

// Who interrupts a warming is told how much is there, and that nothing is lost.
func TestWarmInterrupted(t *testing.T) {
	ctx, interrupt := context.WithCancel(t.Context())
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, warmHave+"\n"+warmDone)
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}))
	defer srv.Close()
	root := newRoot()
	root.SetOut(io.Discard)
	root.SetErr(writerFunc(func(p []byte) (int, error) {
		interrupt() // the first image is there
		return len(p), nil
	}))
	root.SetArgs([]string{"warm", "app:1", "gone:1", "--server", srv.URL})
	err := root.ExecuteContext(ctx)
	if err == nil || !strings.Contains(err.Error(), "1 of 2 images are here whole") || !strings.Contains(err.Error(), "running it again goes on") {
		t.Errorf("%v", err)
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// What an image says of itself cannot move the cursor of a terminal.
func TestWarmQuotesPlatforms(t *testing.T) {
	hostile := strings.Replace(warmDone, "linux/amd64", `linux/\u001b[2J`, 1)
	out, _, _ := runAgainst(t, lines(hostile, `{"done":true,"complete":true,"failed":[]}`), "warm", "app:1")
	if strings.Contains(out, "\x1b") {
		t.Errorf("%q", out)
	}
}

// A scrub that found something exits with 3.
func TestScrubTells(t *testing.T) {
	found := `{"done":true,"checked":2,"bytes":4096,"wrong":[{"digest":"sha256:aa","action":"refilled"}]}`
	out, _, code := runAgainst(t, lines(`{"checked":1,"bytes":10,"total":20}`, found), "cache", "scrub")
	if code != exitWrong || !strings.Contains(out, "sha256:aa  refilled") {
		t.Errorf("exit %d\n%s", code, out)
	}
	out, _, code = runAgainst(t, lines(`{"checked":1,"bytes":10,"total":20}`, `{"done":true,"checked":2,"bytes":4096,"wrong":[]}`), "cache", "scrub")
	if code != 0 || !strings.Contains(out, "checked 4 KiB in 2 pieces, 0 were wrong") {
		t.Errorf("exit %d\n%s", code, out)
	}
	if _, errs, code := runAgainst(t, lines(), "cache", "scrub", "--rate", "fast"); code != exitUsage || !strings.Contains(errs, "--rate") {
		t.Errorf("exit %d\n%s", code, errs)
	}
}

// An export that stops in the middle leaves no file that looks like a bundle.
func TestAnExportThatStopsLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	file := dir + "/out.tar"
	first := true
	_, errs, code := runAgainst(t, func(w http.ResponseWriter) {
		if first { // the key is asked for first
			first = false
			fmt.Fprintln(w, "tidemark.test/log+b71d1c19+AVbNTs0x5XyWF7A2+qmCjyCDwpC9CzEmVPYcxTzWXJwl")
			return
		}
		w.Header().Set("Content-Length", "1000")
		fmt.Fprint(w, "half")
	}, "export", "-o", file, "app:1")
	if code == 0 {
		t.Errorf("exit %d\n%s", code, errs)
	}
	if files := listDir(t, dir); len(files) != 0 {
		t.Errorf("%v is left", files)
	}
}

func listDir(t *testing.T, dir string) (names []string) {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		names = append(names, f.Name())
	}
	return names
}
