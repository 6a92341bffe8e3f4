package publish

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
	"net/url"
	"strconv"
	"strings"
	"time"

	"tidemark/audit"
)

// A Webhook posts every checkpoint as it is (c2sp.org/tlog-checkpoint), with the
// headers of Standard Webhooks 1.0.0; the signature only with a secret. It
// follows no redirects.
type Webhook struct {
	address *url.URL
	secret  []byte
	client  *http.Client
	now     func() time.Time
}

// NewWebhook returns the sink at address. A secret that begins with whsec_ is
// base64, as Standard Webhooks has it; any other is taken as it is.
func NewWebhook(address, secret string) (*Webhook, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, errors.New("webhook: the address cannot be read") // which may hold a secret
	}
	w := &Webhook{address: u, secret: []byte(secret), now: time.Now}
	if encoded, ok := strings.CutPrefix(secret, "whsec_"); ok {
		if w.secret, err = base64.StdEncoding.DecodeString(encoded); err != nil {
			return nil, errors.New("webhook: the secret begins with whsec_ and is not base64")
		}
	}
	w.client = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return w, nil
}

// Name implements Sink. Paths and queries of webhooks are often secrets.
func (w *Webhook) Name() string { return "webhook " + w.address.Scheme + "://" + w.address.Host }

// ID implements Sink: two webhooks of one host differ in what is not shown.
func (w *Webhook) ID() string {
	sum := sha256.Sum256([]byte(w.address.String()))
	return w.Name() + " " + base64.RawURLEncoding.EncodeToString(sum[:12])
}

// Put implements Sink.
func (w *Webhook) Put(ctx context.Context, signed audit.Signed) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.address.String(), bytes.NewReader(signed.Note))
	if err != nil {
		return errors.New("the address cannot be posted to")
	}
	sum := sha256.Sum256(signed.Note)
	id := "checkpoint-" + strconv.FormatInt(signed.Tree.N, 10) + "-" + base64.RawURLEncoding.EncodeToString(sum[:9])
	stamp := strconv.FormatInt(w.now().Unix(), 10)
	req.Header.Set("Content-Type", "text/plain; charset=utf-8")
	req.Header.Set("Webhook-Id", id)
	req.Header.Set("Webhook-Timestamp", stamp)
	if len(w.secret) > 0 {
		mac := hmac.New(sha256.New, w.secret)
		fmt.Fprintf(mac, "%s.%s.%s", id, stamp, signed.Note)
		req.Header.Set("Webhook-Signature", "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	}
	resp, err := w.client.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // without the address
		}
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)); err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return errors.New("answered " + resp.Status)
	}
	return nil
}
