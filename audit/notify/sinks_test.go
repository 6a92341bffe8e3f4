package notify_test

import (
	"encoding/json"
	"flag"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/notify"
	"tidemark/audit/notify/alertmanager"
	"tidemark/audit/notify/discord"
	"tidemark/audit/notify/exec"
	"tidemark/audit/notify/jsonl"
	"tidemark/audit/notify/matrix"
	"tidemark/audit/notify/ntfy"
	"tidemark/audit/notify/slack"
	"tidemark/audit/notify/syslog"
	"tidemark/audit/notify/teams"
)

var update = flag.Bool("update", false, "write the golden payloads")

// sample is a message that always is the same: a held move, with text that means
// something to one medium or another.
func sample(t *testing.T) notify.Message {
	t.Helper()
	before := time.Date(2026, 4, 22, 12, 31, 2, 0, time.UTC)
	until := before.Add(20 * time.Hour)
	e := audit.Event{
		ID: uuid.MustParse("01993d0e-6c1b-7f52-9a55-0d3c1f0a7a10"), Type: audit.Held, Time: time.Date(2026, 4, 22, 12, 41, 7, 0, time.UTC),
		Ref: audittest.Ref("1.27"), Old: &audit.Content{Digest: audittest.Digest("old")}, New: &audit.Content{Digest: audittest.Digest("new")},
		Interval: &audit.Interval{NotBefore: &before, NotAfter: before.Add(10 * time.Minute)}, Signals: []string{"entrypoint_changed", "<!channel> @everyone ```"},
		Reason: "cooldown", Policy: audit.Effect{Rule: "careful", Mode: audit.Cooldown, Served: audittest.Digest("old"), Until: &until},
	}
	leaf, err := e.Leaf()
	if err != nil {
		t.Fatal(err)
	}
	return notify.Message{ID: e.ID.String() + ".ops", Origin: "tidemark.test/log", Items: []notify.Item{{Index: 41, Leaf: leaf, Event: e, Clients: 14}}}
}

// golden compares with a file of testdata.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("%s: sent\n%s\nwant\n%s", name, got, want)
	}
}

// The text has all that somebody wants to know who is woken by it.
func TestTextIsAllThere(t *testing.T) {
	m := sample(t)
	golden(t, "text.txt", []byte(m.Title()+"\n\n"+m.Text()+"\n"))
}

// What each medium is sent is what its documentation has, and nothing in it is read
// as a mention or as markup.
func TestPayloads(t *testing.T) {
	var body []byte
	var head http.Header
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var err error
		head = r.Header
		if body, err = io.ReadAll(r.Body); err != nil {
			t.Error(err)
		}
	}))
	defer s.Close()
	for name, open := range map[string]func() (notify.Sink, error){
		"slack.json":        func() (notify.Sink, error) { return slack.New(s.URL) },
		"teams.json":        func() (notify.Sink, error) { return teams.New(s.URL) },
		"discord.json":      func() (notify.Sink, error) { return discord.New(s.URL) },
		"matrix.json":       func() (notify.Sink, error) { return matrix.New(s.URL, "!abc:example.org", "tk_secret") },
		"alertmanager.json": func() (notify.Sink, error) { return alertmanager.New(s.URL) },
		"ntfy.txt":          func() (notify.Sink, error) { return ntfy.New(s.URL+"/topic", "tk_secret\n") },
	} {
		sink, err := open()
		if err != nil {
			t.Fatal(err)
		}
		if err := sink.Send(t.Context(), sample(t)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if strings.HasSuffix(name, ".json") {
			var v any
			if err := json.Unmarshal(body, &v); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if body, err = json.MarshalIndent(v, "", "  "); err != nil {
				t.Fatal(err)
			}
		} else if head.Get("Authorization") != "Bearer tk_secret" || head.Get("Priority") != "4" || head.Get("Title") == "" {
			t.Errorf("%s: head %v", name, head)
		}
		golden(t, name, append(body, '\n'))
	}
}

// A file has one event a line, each whole, and goes on after it was moved away.
func TestFileHasOneEventALine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "alerts.jsonl")
	sink := jsonl.New(path)
	for range 2 {
		if err := sink.Send(t.Context(), sample(t)); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(path)
	if err != nil || strings.Count(string(text), "\n") != 2 {
		t.Fatalf("%q, %v", text, err)
	}
	golden(t, "line.jsonl", []byte(strings.SplitAfter(string(text), "\n")[0]))
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if err := sink.Send(t.Context(), sample(t)); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(path); err != nil || strings.Count(string(text), "\n") != 1 {
		t.Errorf("%q, %v", text, err)
	}
	if err := jsonl.New(t.TempDir()).Send(t.Context(), sample(t)); err == nil {
		t.Error("a folder took it")
	}
}

// A program gets the event and what it says, and none of our environment; one that
// fails or hangs has not taken it.
func TestProgramIsCalled(t *testing.T) {
	t.Setenv("A_SECRET", "s3cret")
	out := filepath.Join(t.TempDir(), "out")
	sink, err := exec.New([]string{"/bin/sh", "-c", `{ env; cat; } > "$1"`, "sh", out})
	if err != nil {
		t.Fatal(err)
	}
	if err := sink.Send(t.Context(), sample(t)); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"TIDEMARK_REF=docker.io/library/app:1.27", "TIDEMARK_TYPE=tag.held", "TIDEMARK_SEVERITY=warning", "TIDEMARK_INDEX=41", `"type":"dev.tidemark.tag.held.v1"`} {
		if !strings.Contains(string(text), want) {
			t.Errorf("it was not given %s", want)
		}
	}
	if strings.Contains(string(text), "s3cret") {
		t.Error("it was given our secrets")
	}
	failing, err := exec.New([]string{"/bin/sh", "-c", "echo disk is full; exit 3"})
	if err != nil {
		t.Fatal(err)
	}
	if err := failing.Send(t.Context(), sample(t)); err == nil || !strings.Contains(err.Error(), "disk is full") {
		t.Errorf("a program that failed: %v", err)
	}
}

// Over TCP each message is framed, over UDP it is a packet; in every format it is one
// line that begins as RFC 5424 has it.
func TestSyslog(t *testing.T) {
	for _, format := range syslog.Formats {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan string, 1)
		go func() {
			c, err := l.Accept()
			if err != nil {
				got <- err.Error()
				return
			}
			defer c.Close()
			b, _ := io.ReadAll(c)
			got <- string(b)
		}()
		sink, err := syslog.New("tcp://"+l.Addr().String(), format)
		if err != nil {
			t.Fatal(err)
		}
		if err := sink.Send(t.Context(), sample(t)); err != nil {
			t.Fatal(err)
		}
		frame := <-got
		l.Close()
		length, line, _ := strings.Cut(frame, " ")
		m := regexp.MustCompile(`^<108>1 2026-04-22T12:41:07\.000Z \S+ tidemark - tag\.held - (.*)$`).FindStringSubmatch(line)
		if length != strconv.Itoa(len(line)) || m == nil {
			t.Fatalf("%s: %q", format, frame)
		}
		golden(t, "syslog-"+format+".txt", []byte(m[1]+"\n"))
	}
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	sink, err := syslog.New("udp://"+packets.LocalAddr().String(), syslog.CEF)
	if err != nil {
		t.Fatal(err)
	}
	if err := sink.Send(t.Context(), sample(t)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64<<10)
	n, _, err := packets.ReadFrom(buf)
	if err != nil || !strings.HasPrefix(string(buf[:n]), "<108>1 ") {
		t.Errorf("%q, %v", buf[:n], err)
	}
	down, err := syslog.New("tcp://127.0.0.1:1", syslog.JSON)
	if err != nil {
		t.Fatal(err)
	}
	if err := down.Send(t.Context(), sample(t)); err == nil {
		t.Error("nobody is there, and it was taken")
	}
}
