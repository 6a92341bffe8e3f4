package publish_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/publish"
)

// A memory keeps facts, and can be told to fail.
type memory struct {
	mu    sync.Mutex
	facts map[string]string
	err   error

	remembered func() // called after every Remember, if set
}

func (m *memory) Recall(_ context.Context, key string) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.facts[key], nil
}

func (m *memory) Remember(_ context.Context, key, value string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err == nil {
		m.facts[key] = value
	}
	if m.remembered != nil {
		m.remembered()
	}
	return m.err
}

// A sink notes what it gets, and fails when it is told to.
type sink struct {
	mu   sync.Mutex
	got  []int64
	fail error
}

func (*sink) Name() string { return "test" }
func (*sink) ID() string   { return "test" }

func (s *sink) Put(_ context.Context, signed audit.Signed) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got = append(s.got, signed.Tree.N)
	return s.fail
}

func (s *sink) want(t *testing.T, want ...int64) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if fmt.Sprint(s.got) != fmt.Sprint(want) {
		t.Errorf("published %v, want %v", s.got, want)
	}
}

func signed(n int64) audit.Signed {
	return audit.Signed{Note: fmt.Appendf(nil, "tidemark.test/log\n%d\n%s\n\n— tidemark.test/log xxxx\n", n, base64.StdEncoding.EncodeToString(make([]byte, 32))), Tree: tlog.Tree{N: n}}
}

// Every sink gets the newest checkpoint, once: also when it was down meanwhile,
// and over a restart. What was done and could not be noted is done again.
func TestNewestCheckpointReachesEverySink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		now := signed(1)
		last := func() audit.Signed {
			mu.Lock()
			defer mu.Unlock()
			return now
		}
		sign := func(n int64) {
			mu.Lock()
			defer mu.Unlock()
			now = signed(n)
		}
		s, m := &sink{}, &memory{facts: make(map[string]string)}
		start := func() (*publish.Publisher, func()) {
			p := publish.New("tidemark.test/log", last, m, []publish.Sink{s}, zerolog.New(io.Discard))
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- p.Run(ctx) }()
			synctest.Wait()
			return p, func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
		}
		p, stop := start()
		s.want(t, 1)
		sign(2)
		p.Signed()
		synctest.Wait()
		s.want(t, 1, 2)
		s.fail = errors.New("503")
		sign(3)
		p.Signed()
		synctest.Wait()
		s.want(t, 1, 2, 3)
		if got := fmt.Sprint(p.Troubles()); got != "[test: 503]" {
			t.Errorf("troubles are %s", got)
		}
		for n := int64(4); n < 10; n++ {
			sign(n)
			p.Signed()
		}
		synctest.Wait()
		s.want(t, 1, 2, 3) // a sink in trouble is left alone for a while
		time.Sleep(9 * time.Second)
		s.want(t, 1, 2, 3, 9)
		s.mu.Lock()
		s.fail = nil
		s.mu.Unlock()
		time.Sleep(20 * time.Second)
		s.want(t, 1, 2, 3, 9, 9)
		time.Sleep(24 * time.Hour)
		s.want(t, 1, 2, 3, 9, 9)
		if got := p.Troubles(); len(got) > 0 {
			t.Errorf("troubles are %v after it was mended", got)
		}
		stop()
		_, stop = start()
		s.want(t, 1, 2, 3, 9, 9)
		stop()
		sign(10)
		m.err = errors.New("disk full")
		_, stop = start()
		stop()
		m.err = nil
		_, stop = start()
		s.want(t, 1, 2, 3, 9, 9, 10, 10)
		stop()
	})
}

// That one sink got its checkpoint does not hide that another did not, whatever
// they are called.
func TestTroublesAreOfEachSink(t *testing.T) {
	var p *publish.Publisher
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/bad" {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		for len(p.Troubles()) == 0 && ctx.Err() == nil { // the good one is done last
			runtime.Gosched()
		}
	}))
	defer srv.Close()
	var sinks []publish.Sink
	for _, path := range []string{"/bad", "/good"} { // one host, one name
		hook, err := publish.NewWebhook(srv.URL+path, "")
		if err != nil {
			t.Fatal(err)
		}
		sinks = append(sinks, hook)
	}
	m := &memory{facts: make(map[string]string), remembered: cancel}
	p = publish.New("tidemark.test/log", func() audit.Signed { return signed(1) }, m, sinks, zerolog.Nop())
	if err := p.Run(ctx); err != nil {
		t.Error(err)
	}
	if got := p.Troubles(); len(m.facts) != 1 || len(got) != 1 || !strings.Contains(got[0].Error(), "500") {
		t.Errorf("%d sinks are done, and troubles are %v; want one and one", len(m.facts), got)
	}
}

// A file always holds the newest checkpoint. What the log does not contain any
// more, because it was taken back, is left there: it is the proof.
func TestFileIsAWitness(t *testing.T) {
	var back error
	var asked []string
	f := publish.File{Path: filepath.Join(t.TempDir(), "checkpoint"), Follows: func(_ context.Context, before []byte) error {
		asked = append(asked, string(before))
		return back
	}}
	for _, n := range []int64{1, 5, 5} {
		if err := f.Put(t.Context(), signed(n)); err != nil {
			t.Fatal(err)
		}
	}
	if len(asked) != 3 || asked[0] != "" || asked[1] != string(signed(1).Note) || asked[2] != string(signed(5).Note) {
		t.Errorf("it was looked whether the log follows %q, want what was published", asked)
	}
	back = audit.ErrRollback
	for _, n := range []int64{4, 5, 6} {
		if err := f.Put(t.Context(), signed(n)); !errors.Is(err, audit.ErrRollback) || !strings.Contains(err.Error(), "left as it is") {
			t.Errorf("%d entries of a log that was taken back: %v", n, err)
		}
	}
	if got, err := os.ReadFile(f.Path); err != nil || !bytes.Equal(got, signed(5).Note) {
		t.Errorf("the file holds %q, %v", got, err)
	}
	back = nil
	f.Path = filepath.Join(t.TempDir(), "absent", "x")
	if err := f.Put(t.Context(), signed(1)); err == nil {
		t.Error("a folder that is not there was written to")
	}
}

// A webhook gets the checkpoint as it is, signed as Standard Webhooks has it;
// whatever it answers but 2xx is told, without its address, which may be a secret.
func TestWebhook(t *testing.T) {
	status, requests := 204, 0
	secret := []byte("0123456789abcdef")
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests++
		body, _ := io.ReadAll(r.Body)
		mac := hmac.New(sha256.New, secret)
		fmt.Fprintf(mac, "%s.%s.%s", r.Header.Get("webhook-id"), r.Header.Get("webhook-timestamp"), body)
		if want := "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil)); r.Header.Get("webhook-signature") != want {
			t.Errorf("signature is %q, want %q", r.Header.Get("webhook-signature"), want)
		}
		if !bytes.Equal(body, signed(7).Note) || !strings.HasPrefix(r.Header.Get("webhook-id"), "checkpoint-7-") {
			t.Errorf("got %q as %s", body, r.Header.Get("webhook-id"))
		}
		w.Header().Set("Location", "http://127.0.0.1:1/elsewhere")
		w.WriteHeader(status)
	}))
	defer srv.Close()
	hook, err := publish.NewWebhook(srv.URL+"/hook/s3cret?key=s3cret", "whsec_"+base64.StdEncoding.EncodeToString(secret))
	if err != nil {
		t.Fatal(err)
	}
	if other, err := publish.NewWebhook(srv.URL+"/other", ""); err != nil || other.ID() == hook.ID() || strings.Contains(hook.ID(), "s3cret") {
		t.Errorf("two webhooks of one host are %q and %q, %v", hook.ID(), other.ID(), err)
	}
	for _, status = range []int{200, 204, 302, 410, 500} {
		err := hook.Put(t.Context(), signed(7))
		if (err == nil) != (status < 300) || err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%d: %v", status, err)
		}
	}
	if requests != 5 {
		t.Errorf("%d requests, want 5: redirects are not followed", requests)
	}
	srv.Close()
	if err := hook.Put(t.Context(), signed(7)); err == nil || strings.Contains(err.Error()+hook.Name(), "s3cret") {
		t.Errorf("nobody there: %v", err)
	}
	if _, err := publish.NewWebhook(srv.URL, "whsec_not base64"); err == nil || strings.Contains(err.Error(), "not base64!") {
		t.Errorf("a secret that is none: %v", err)
	}
}
