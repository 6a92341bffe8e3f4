package e2e

import (
	"context"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/proxy/admin"
)

// A worker is a client command that runs.
type worker struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func (s *server) begin(ctx context.Context, args ...string) *worker {
	s.t.Helper()
	w := &worker{exec.CommandContext(ctx, binary, args...), make(chan struct{})}
	w.cmd.Env = append(os.Environ(), "TIDEMARK_SERVER="+s.admin)
	if err := w.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() { _ = w.cmd.Wait(); close(w.done) }()
	return w
}

// killed runs a client command over and over, on a server that start starts, and kills
// the server, or with client the command, later each time: until the command ends before
// that, which is returned, or has been killed as often as tries says. check looks at what
// is left each time, when nothing runs.
func killed(t *testing.T, tries int, client bool, start func() *server, check func(), args ...string) {
	t.Helper()
	kills := 0
	for delay := 5 * time.Millisecond; kills < tries; delay += delay / 2 {
		s := start()
		w := s.begin(t.Context(), args...)
		select {
		case <-w.done:
			s.kill()
			if w.cmd.ProcessState.ExitCode() == 0 && kills > 0 {
				t.Logf("%s: killed %d times, then it ended within %v", args[0], kills, delay)
				check()
				return
			}
			delay /= 2
		case <-time.After(delay):
			if client {
				_ = w.cmd.Process.Kill()
				<-w.done
			}
			s.kill()
			<-w.done
			kills++
		}
		check()
	}
	t.Logf("%s: killed %d times", args[0], kills)
}

// Whenever a server is killed, or the command that uses it, while images are warmed,
// exported, imported or scrubbed: what is visible is right and whole, and the next try
// goes on and ends well.
func TestKilledWhileImagesAreCarried(t *testing.T) {
	const images = 3
	up := httptest.NewServer(newMaker(images, 24<<20))
	defer up.Close()
	dir := t.TempDir()
	fromData, toData := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	var refs []string
	for i := range images {
		refs = append(refs, fmt.Sprint("app:", i))
	}
	from := func() *server { return serve(t, config(fromData, up.URL)) }
	killed(t, 12, false, from, func() { sound(t, fromData) }, append([]string{"warm"}, refs...)...)
	s := from()
	must(t, s, append([]string{"warm"}, refs...)...)
	s.verified(images)
	s.stop()

	file := filepath.Join(dir, "bundle.tar")
	whole := func() {
		t.Helper()
		if _, err := os.Stat(file); err != nil {
			return
		}
		if out, err := exec.Command(binary, "verify", "--bundle", file).CombinedOutput(); err != nil {
			t.Errorf("there is a bundle that is none: %s", out)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	export := append([]string{"export", "-o", file}, refs...)
	killed(t, 8, false, from, whole, export...)
	killed(t, 8, true, from, whole, export...)
	s = from()
	must(t, s, export...)
	s.stop()

	to := func() *server { return serve(t, config(toData, up.URL), "--offline") }
	in := []string{"import", file, "--trust", filepath.Join(fromData, "log.vkey")}
	allOrNothing := func() {
		t.Helper()
		sound(t, toData)
		s := to()
		defer s.kill()
		var tags admin.TagList
		s.getJSON("/api/v1/tags", &tags)
		if n := len(tags.Tags); n != 0 && n != images {
			t.Errorf("%d of %d tags are there", n, images)
		}
		if len(tags.Tags) == images {
			if out, _ := s.run("cache", "ls", "--incomplete", "--verify"); strings.Contains(out, "app:") {
				t.Errorf("tags are there without their bytes:\n%s", out)
			}
		}
		if out, code := exec.Command(binary, "verify", "--data", toData).CombinedOutput(); code != nil && !strings.Contains(string(out), "nothing was signed") {
			t.Errorf("the log: %s", out)
		}
	}
	killed(t, 16, false, to, allOrNothing, in...)
	killed(t, 4, true, to, allOrNothing, in...)
	s = to()
	must(t, s, in...)
	if out := must(t, s, "cache", "ls", "--complete", "--verify"); strings.Count(out, "app:") != images {
		t.Errorf("after all that it has\n%s", out)
	}
	if out, code := s.run("verify"); code != 0 {
		t.Errorf("the log: %s", out)
	}
	s.stop()

	blobs, err := filepath.Glob(filepath.Join(toData, "blobs/sha256/*"))
	if err != nil {
		t.Fatal(err)
	}
	spoiled := ""
	for _, b := range blobs {
		if sizeOf(t, b) == 24<<20 {
			spoiled = b
		}
	}
	f, err := os.OpenFile(spoiled, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt([]byte("spoiled"), 1<<20)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	scrubbed := func() {}
	killed(t, 6, false, to, scrubbed, "cache", "scrub", "--rate", "1GiB")
	s = to()
	out, _ := s.run("cache", "scrub", "--rate", "1GiB")
	if log, _ := s.run("log", "--type", "operator.action", "--json"); !strings.Contains(log, `"scrub"`) {
		t.Errorf("no scrub has told of what was spoiled:\n%s\n%s", out, log)
	}
	s.stop()
	if _, err := os.Stat(spoiled); err == nil {
		t.Error("what was spoiled is still there")
	}
	sound(t, toData)
}
