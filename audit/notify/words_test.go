package notify_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/notify"
	"tidemark/audit/notify/alertmanager"
	"tidemark/audit/notify/discord"
	"tidemark/audit/notify/matrix"
	"tidemark/audit/notify/ntfy"
	"tidemark/audit/notify/shoutrrr"
	"tidemark/audit/notify/slack"
	"tidemark/audit/notify/teams"
	"tidemark/audit/notify/webhook"
)

// Templates say what an operator wants, of what there is; one that does not work is
// refused when it is read, and one that does not work on a message leaves it as it is.
func TestTemplates(t *testing.T) {
	for text, want := range map[string]string{
		`{{range .Items}}{{.Severity | upper}} {{.Ref}} {{short .Old}}{{end}}`: "",
		`{{.Nothing}}`:       "can't evaluate field Nothing",
		`{{range .Items}}`:   "unexpected EOF",
		`{{index .Items 7}}`: "index out of range",
		`{{template "x"}}`:   `template "x" not defined`,
		`{{range .Items}}{{range $.Items}}{{printf "%70000s" .Ref}}{{end}}{{end}}`: "writes more than 64 KiB",
	} {
		if _, err := notify.ParseTemplates("", text); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		s := &scripted{}
		r := route("ops", s)
		var err error
		if r.Templates, err = notify.ParseTemplates("{{(index .Items 0).Tag}} moved\r\nBcc: x", `{{range .Items}}{{slice .Ref 10 (len .Ref)}}: {{join ", " .Signals}}{{if eq .Tag "bad"}}{{index .Signals 99}}{{end}}{{end}}`); err != nil {
			t.Fatal(err)
		}
		h := newHouse(t, r)
		defer h.close()
		for _, tag := range []string{"good", "bad"} {
			h.see(audittest.Ref(tag), "one")
			h.see(audittest.Ref(tag), "two", "user_to_root")
			time.Sleep(time.Hour)
		}
		_, got, _ := s.so()
		if len(got) != 2 || got[0].Title() != "good moved Bcc: x" || got[0].Text() != "library/app:good: user_to_root" {
			t.Fatalf("told %q %q", got[0].Title(), got[0].Text())
		}
		if !strings.HasPrefix(got[1].Title(), "[high] docker.io/library/app:bad moved") || !strings.Contains(got[1].Text(), "signals") {
			t.Errorf("what does not work says what is built in: %q %q", got[1].Title(), got[1].Text())
		}
		title, text, err := h.d.Preview("ops", "move", nil)
		if err != nil || title != "latest moved Bcc: x" || !strings.HasPrefix(text, "checkmarx/kics:latest: ") {
			t.Errorf("preview: %q, %q, %v", title, text, err)
		}
	})
}

// A listener keeps what it is sent.
type listener struct {
	*httptest.Server
	body   []byte
	header http.Header
	path   string
	status int
	asked  int
}

func listen(t *testing.T) *listener {
	l := &listener{status: 200}
	l.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var err error
		if l.body, err = io.ReadAll(r.Body); err != nil {
			t.Error(err)
		}
		l.header, l.path = r.Header, r.URL.Path
		l.asked++
		if l.status/100 == 3 {
			w.Header().Set("Location", l.URL+"/elsewhere")
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(l.status)
		_, _ = io.WriteString(w, "{}")
	}))
	t.Cleanup(l.Close)
	return l
}

// A message of many events is at most 20 KB: their data is where they say.
func TestLargeMessagesReferToTheirData(t *testing.T) {
	l := listen(t)
	m := sample(t)
	small := m.Items[0]
	for i := range 49 {
		item := small
		item.Index = int64(100 + i)
		m.Items = append(m.Items, item)
	}
	for _, format := range []string{webhook.CloudEvents, webhook.Plain, webhook.Slack} {
		sink, err := webhook.New(l.URL, format, "")
		if err != nil {
			t.Fatal(err)
		}
		if err := sink.Send(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		if len(l.body) > 20<<10 {
			t.Errorf("%s: %d bytes", format, len(l.body))
		}
		if format != webhook.CloudEvents {
			continue
		}
		var events []notify.CloudEvent
		if err := json.Unmarshal(l.body, &events); err != nil || len(events) != 50 {
			t.Fatalf("%d events, %v", len(events), err)
		}
		if e := events[49]; e.DataRef != "/api/v1/events/148" || e.Data != nil || e.Type == "" || e.Subject == "" {
			t.Errorf("the last: %+v", e)
		}
	}
}

// Who waits for new images as a registry tells of them hears of what clients get: not of
// what is held, and of it when it is released.
func TestAsARegistryTells(t *testing.T) {
	l := listen(t)
	sink, err := webhook.New(l.URL, webhook.Registry, "")
	if err != nil {
		t.Fatal(err)
	}
	m := sample(t)
	if err := sink.Send(t.Context(), m); err != nil || l.asked != 0 {
		t.Errorf("what is held: asked %d times, %v", l.asked, err)
	}
	e := &m.Items[0].Event
	e.New.MediaType, e.New.Size = "application/vnd.oci.image.index.v1+json", 1609
	for kind, action := range map[audit.Type]string{audit.Released: "push", audit.Moved: "push", audit.Deleted: "delete"} {
		e.Type, e.Policy.Served = kind, e.New.Digest
		if err := sink.Send(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		var got struct {
			Events []struct {
				ID, Action string
				Target     struct{ MediaType, Digest, Repository, Tag string }
				Request    struct{ Host string }
			}
		}
		if err := json.Unmarshal(l.body, &got); err != nil || len(got.Events) != 1 || l.header.Get("Content-Type") != "application/vnd.docker.distribution.events.v2+json" {
			t.Fatalf("%s, %v", l.body, err)
		}
		r := got.Events[0]
		if want := map[string]string{"push": e.New.Digest.String(), "delete": e.Old.Digest.String()}[action]; r.Action != action || r.Target.Digest != want || r.Target.Repository != "library/app" || r.Target.Tag != "1.27" || r.Request.Host != "docker.io" {
			t.Errorf("%s: %+v", kind, r)
		}
	}
}

// The services of shoutrrr get title and text; what they answer is told, without any part
// of the address that may be a secret, and no redirect is followed.
func TestShoutrrr(t *testing.T) {
	l := listen(t)
	host := strings.TrimPrefix(l.URL, "http://")
	sink, err := shoutrrr.New("shoutrrr://gotify://" + host + "/AzyoeNS.D4iJLVa?disabletls=yes")
	if err != nil {
		t.Fatal(err)
	}
	if err := sink.Send(t.Context(), sample(t)); err != nil {
		t.Fatal(err)
	}
	var got struct{ Title, Message string }
	if err := json.Unmarshal(l.body, &got); err != nil || !strings.HasPrefix(got.Title, "[warning] docker.io/library/app:1.27") || !strings.Contains(got.Message, "entrypoint_changed") || len(got.Message) > 1000 {
		t.Errorf("%s %s, %v", l.path, l.body, err)
	}
	for _, status := range []int{500, 429, 302, 307} {
		l.status, l.asked = status, 0
		err := sink.Send(t.Context(), sample(t))
		var f *notify.Failure
		if !errors.As(err, &f) || strings.Contains(err.Error(), "AzyoeNS") || !strings.HasPrefix(err.Error(), "gotify: ") || l.asked != 1 {
			t.Errorf("%d: %v, asked %d times", status, err, l.asked)
		}
	}
	l.Close()
	if err := sink.Send(t.Context(), sample(t)); err == nil || strings.Contains(err.Error(), "AzyoeNS") || strings.Contains(err.Error(), host) {
		t.Errorf("nobody is there: %v", err)
	}
	for _, bad := range []string{"", "nonsense", "pigeon://a-secret/b-secret", "telegram://a-secret@telegram", "://a-secret"} {
		if _, err := shoutrrr.New(bad); err == nil || strings.Contains(err.Error(), "-secret") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// Every sink that posts tells faults apart, says them without what may be secret, and is
// sent nowhere else.
func TestFaultsOfEverySink(t *testing.T) {
	elsewhere := listen(t)
	var kind atomic.Value
	kind.Store("")
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // only then it is noticed that a client has gone
		switch kind.Load() {
		case "500":
			w.WriteHeader(http.StatusInternalServerError)
		case "429":
			w.Header().Set("Retry-After", "30")
			w.WriteHeader(http.StatusTooManyRequests)
		case "410":
			w.WriteHeader(http.StatusGone)
		case "redirect":
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		case "reset":
			if c, _, err := http.NewResponseController(w).Hijack(); err == nil {
				_ = c.Close()
			}
		case "silence":
			<-r.Context().Done()
		}
	}))
	defer func() { s.CloseClientConnections(); s.Close() }()
	host := strings.TrimPrefix(s.URL, "http://")
	open := map[string]func() (notify.Sink, error){
		"webhook":      func() (notify.Sink, error) { return webhook.New(s.URL+"/a-secret", "", "whsec_YS1zZWNyZXQ=") },
		"slack":        func() (notify.Sink, error) { return slack.New(s.URL + "/a-secret") },
		"teams":        func() (notify.Sink, error) { return teams.New(s.URL + "/a-secret") },
		"discord":      func() (notify.Sink, error) { return discord.New(s.URL + "/a-secret") },
		"ntfy":         func() (notify.Sink, error) { return ntfy.New(s.URL+"/topic", "a-secret") },
		"matrix":       func() (notify.Sink, error) { return matrix.New(s.URL, "!room:example.org", "a-secret") },
		"alertmanager": func() (notify.Sink, error) { return alertmanager.New(s.URL + "/a-secret") },
		"shoutrrr": func() (notify.Sink, error) {
			return shoutrrr.New("gotify://" + host + "/Aa-secret.12345?disabletls=yes")
		},
	}
	for name, open := range open {
		sink, err := open()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, fault := range []string{"500", "429", "410", "redirect", "reset", "silence"} {
			kind.Store(fault)
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			err := sink.Send(ctx, sample(t))
			cancel()
			var f *notify.Failure
			if !errors.As(err, &f) || strings.Contains(err.Error(), "a-secret") {
				t.Errorf("%s, %s: %v", name, fault, err)
				continue
			}
			if name == "shoutrrr" {
				continue // its services tell neither
			}
			if f.Gone != (fault == "410") || (f.After == 30*time.Second) != (fault == "429") {
				t.Errorf("%s, %s: gone %t, after %v", name, fault, f.Gone, f.After)
			}
		}
	}
	if elsewhere.asked > 0 {
		t.Errorf("redirects were followed %d times", elsewhere.asked)
	}
}
