package webhook_test

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	svix "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/notify"
	"tidemark/audit/notify/webhook"
)

// message is about moves that always are the same.
func message(t *testing.T, n int) notify.Message {
	t.Helper()
	m := notify.Message{Origin: "tidemark.test/log"}
	for i := range n {
		e := audit.Event{
			ID: uuid.MustParse("01993d0e-6c1b-7f52-9a55-0d3c1f0a7a1" + string(rune('0'+i))), Type: audit.Moved, Time: time.Date(2026, 4, 22, 12, 41, 7, 113e6, time.UTC),
			Ref: audittest.Ref("1.27"), Old: &audit.Content{Digest: audittest.Digest("old")}, New: &audit.Content{Digest: audittest.Digest("new")},
			Class: audit.ClassUnknown, Signals: []string{"user_to_root"}, Policy: audit.Effect{Mode: audit.Alert, Served: audittest.Digest("new")},
		}
		leaf, err := e.Leaf()
		if err != nil {
			t.Fatal(err)
		}
		m.Items = append(m.Items, notify.Item{Index: int64(i), Leaf: leaf, Event: e, Clients: -1})
	}
	m.ID = m.Items[0].Event.ID.String() + ".ops"
	return m
}

// received is a request as the receiver got it.
type received struct {
	head http.Header
	body []byte
}

func receiver(t *testing.T, answer http.HandlerFunc) (string, chan received) {
	got := make(chan received, 10)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		got <- received{r.Header, body}
		if answer != nil {
			answer(w, r)
		}
	}))
	t.Cleanup(s.Close)
	return s.URL, got
}

// The library that Standard Webhooks publishes accepts the signature, whichever of
// two keys the receiver has; ed25519 is checked as the specification says.
func TestSignaturesAreStandardWebhooks(t *testing.T) {
	url, got := receiver(t, nil)
	first, second := "whsec_"+base64.StdEncoding.EncodeToString([]byte("0123456789abcdef01234567")), "whsec_"+base64.StdEncoding.EncodeToString([]byte("another key of the receiver"))
	seed := []byte(strings.Repeat("s", ed25519.SeedSize))
	sink, err := webhook.New(url, "", first+"\n"+second+"\nwhsk_"+base64.StdEncoding.EncodeToString(seed)+"\n")
	if err != nil {
		t.Fatal(err)
	}
	m := message(t, 1)
	if err := sink.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	r := <-got
	for _, secret := range []string{first, second} {
		check, err := svix.NewWebhook(secret)
		if err != nil {
			t.Fatal(err)
		}
		if err := check.Verify(r.body, r.head); err != nil {
			t.Errorf("the library: %v", err)
		}
		if err := check.Verify(append(r.body, ' '), r.head); err == nil {
			t.Error("the library accepts another body")
		}
	}
	signed := []byte(r.head.Get("Webhook-Id") + "." + r.head.Get("Webhook-Timestamp") + "." + string(r.body))
	public := ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey)
	found := false
	for _, s := range strings.Fields(r.head.Get("Webhook-Signature")) {
		if encoded, ok := strings.CutPrefix(s, "v1a,"); ok {
			sig, err := base64.StdEncoding.DecodeString(encoded)
			found = err == nil && ed25519.Verify(public, signed, sig)
		}
	}
	if !found || r.head.Get("Webhook-Id") != m.ID {
		t.Errorf("head %v", r.head)
	}
}

// One event is a CloudEvent whose data is the leaf, byte for byte; several are an array.
func TestBodyIsCloudEvents(t *testing.T) {
	url, got := receiver(t, nil)
	sink, err := webhook.New(url, webhook.CloudEvents, "")
	if err != nil {
		t.Fatal(err)
	}
	m := message(t, 1)
	if err := sink.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	r := <-got
	want := `{"specversion":"1.0","id":"01993d0e-6c1b-7f52-9a55-0d3c1f0a7a10","source":"tidemark.test/log","type":"dev.tidemark.tag.moved.v1","subject":"docker.io/library/app:1.27",` +
		`"time":"2026-04-22T12:41:07.113Z","datacontenttype":"application/json","sequence":"0","severitytext":"HIGH","data":` + string(m.Items[0].Leaf) + `}`
	if string(r.body) != want || r.head.Get("Content-Type") != "application/cloudevents+json" || r.head.Get("Webhook-Signature") != "" {
		t.Errorf("sent %v\n%s\nwant\n%s", r.head, r.body, want)
	}
	if err := sink.Send(t.Context(), message(t, 3)); err != nil {
		t.Fatal(err)
	}
	r = <-got
	var batch []notify.CloudEvent
	if err := json.Unmarshal(r.body, &batch); err != nil || len(batch) != 3 || batch[2].Sequence != "2" || r.head.Get("Content-Type") != "application/cloudevents-batch+json" {
		t.Errorf("%v, %d events of type %s", err, len(batch), r.head.Get("Content-Type"))
	}
}

// What receivers answer is taken for what it means; no error has the address, whose
// path is the secret of many.
func TestAnswersAreUnderstood(t *testing.T) {
	var elsewhere int
	private := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere++ }))
	defer private.Close()
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		ok     bool
		after  time.Duration
		gone   bool
	}{
		"accepted": {answer: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(202) }, ok: true},
		"broken":   {answer: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }},
		"busy":     {answer: func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Retry-After", "90"); w.WriteHeader(429) }, after: 90 * time.Second},
		"busy for ever": {answer: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "999999999999")
			w.WriteHeader(503)
		}, after: 24 * time.Hour},
		"gone":                   {answer: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(410) }, gone: true},
		"redirects to somewhere": {answer: func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, private.URL, http.StatusFound) }},
		"redirects with the body": {answer: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, private.URL, http.StatusTemporaryRedirect)
		}},
		"hangs up": {answer: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
	} {
		t.Run(name, func(t *testing.T) {
			url, _ := receiver(t, c.answer)
			sink, err := webhook.New(url+"/the-secret-path?token=the-secret-token", "", "")
			if err != nil {
				t.Fatal(err)
			}
			err = sink.Send(t.Context(), message(t, 1))
			if c.ok {
				if err != nil {
					t.Error(err)
				}
				return
			}
			var f *notify.Failure
			if !errors.As(err, &f) || f.After != c.after || f.Gone != c.gone {
				t.Errorf("%#v", err)
			}
			if err != nil && strings.Contains(err.Error(), "the-secret") {
				t.Errorf("it tells a secret: %v", err)
			}
		})
	}
	if elsewhere > 0 {
		t.Errorf("%d redirects were followed", elsewhere)
	}
	silent, err := webhook.New("http://127.0.0.1:1/the-secret-path", "", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := silent.Send(t.Context(), message(t, 1)); err == nil || strings.Contains(err.Error(), "the-secret") {
		t.Errorf("nobody listens: %v", err)
	}
}

// Keys that are none are refused before anything is sent, without being told.
func TestBadSecretsAreRefused(t *testing.T) {
	for _, s := range []string{"whsec_%%%", "whsk_c2hvcnQ="} {
		if _, err := webhook.New("http://127.0.0.1:1", "", "good\n"+s); err == nil || strings.Contains(err.Error(), s[6:]) || !strings.Contains(err.Error(), "line 2") {
			t.Errorf("%q: %v", s, err)
		}
	}
}
