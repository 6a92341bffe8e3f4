package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A server is a tidemark that runs.
type server struct {
	t        testing.TB
	cmd      *exec.Cmd
	config   string // the file that it was started with
	registry string // http://127.0.0.1:port
	admin    string
	log      *lockedBuffer
	done     chan struct{} // closed when it has ended
	in       []string      // the program that everything about it is run by, nil for none
}

// A lockedBuffer is what a process has written so far.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var addresses = regexp.MustCompile(`(registry|admin) +(https?://\S+)`)

// serve starts tidemark with a configuration, on ports of its choice unless the
// configuration has them, and waits until it says that it listens.
func serve(t testing.TB, config string, args ...string) *server {
	t.Helper()
	return serveIn(t, nil, config, args...)
}

// serveIn starts tidemark by another program, which has a network of its own.
func serveIn(t testing.TB, in []string, config string, args ...string) *server {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tidemark.yaml")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, config: path, log: &lockedBuffer{}, done: make(chan struct{}), in: in}
	line := slices.Concat(in, []string{binary, "serve", "-c", path, "--log-format", "json"}, args)
	s.cmd = exec.Command(line[0], line[1:]...)
	s.cmd.Stderr = s.log
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.kill)
	scan := bufio.NewScanner(out)
	for (s.registry == "" || s.admin == "") && scan.Scan() {
		if m := addresses.FindStringSubmatch(scan.Text()); m != nil && m[1] == "registry" {
			s.registry = m[2]
		} else if m != nil {
			s.admin = m[2]
		}
	}
	go func() {
		_, _ = io.Copy(io.Discard, out)
		_ = s.cmd.Wait()
		close(s.done)
	}()
	if s.admin == "" {
		<-s.done
		t.Fatalf("tidemark did not start:\n%s", s.log)
	}
	return s
}

// kill is kill -9.
func (s *server) kill() {
	_ = s.cmd.Process.Kill() // it may have ended
	<-s.done
}

// stop is SIGTERM and the end, which must be in order.
func (s *server) stop() {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
	<-s.done
	if code := s.cmd.ProcessState.ExitCode(); code != 0 {
		s.t.Errorf("tidemark ended with %d:\n%s", code, s.log)
	}
}

// run runs a client command against the server, and returns what it printed.
func (s *server) run(args ...string) (stdout string, code int) {
	s.t.Helper()
	line := slices.Concat(s.in, []string{binary}, args)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env = append(os.Environ(), "TIDEMARK_SERVER="+s.admin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		s.t.Fatal(err)
	}
	if code = cmd.ProcessState.ExitCode(); code != 0 {
		s.t.Logf("tidemark %s: exit %d: %s", strings.Join(args, " "), code, errs.String())
	}
	return out.String(), code
}

// verified runs tidemark verify and wants it to say that n events are well.
func (s *server) verified(n int) {
	s.t.Helper()
	want := fmt.Sprintf("consistent, %d events", n)
	var out string
	var code int
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		if out, code = s.run("verify"); code == 0 && strings.Contains(out, want) {
			return
		}
		time.Sleep(100 * time.Millisecond) // the last event is signed within a second
	}
	s.t.Errorf("tidemark verify: exit %d, %s; want %q", code, out, want)
}

// getJSON reads an answer of the admin API.
func (s *server) getJSON(path string, v any) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", s.admin+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		s.t.Fatal(err)
	}
}

// get asks the registry.
func (s *server) get(path string) (*http.Response, []byte, error) {
	resp, err := http.Get(s.registry + path)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp, body, err
}

// config is a configuration with one upstream, docker.io, at an address.
func config(data, endpoint string, more ...string) string {
	if !strings.Contains(strings.Join(more, "\n"), "watch:") {
		more = append(more, "watch: {seen: false}") // tests count what is asked upstream
	}
	return fmt.Sprintf(`data: %s
registry: {listen: "127.0.0.1:0"}
admin: {listen: "127.0.0.1:0"}
tags: {ttl: 0s}
upstreams:
  docker.io: {endpoints: ["%s"]}
%s`, data, endpoint, strings.Join(more, "\n"))
}
