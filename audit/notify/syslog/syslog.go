// Package syslog sends events to a syslog server, each a message of RFC 5424, over
// UDP, TCP or TLS.
package syslog

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"tidemark/audit"
	"tidemark/audit/notify"
)

// The formats of the text of a message.
const (
	JSON = "json" // the CloudEvent
	CEF  = "cef"  // ArcSight Common Event Format, 0
	ECS  = "ecs"  // Elastic Common Schema, event.kind alert
	OCSF = "ocsf" // Open Cybersecurity Schema Framework, Detection Finding (2004)
)

// Formats are all of them.
var Formats = []string{JSON, CEF, ECS, OCSF}

// A Sink is a syslog server.
type Sink struct {
	network, address string
	tls              bool
	format           string
	host             string
}

// New returns the sink at udp://, tcp:// or tls://host[:port].
func New(address, format string) (*Sink, error) {
	u, err := url.Parse(address)
	if err != nil || u.Hostname() == "" {
		return nil, errors.New("want an address such as udp://logs.example, tcp://logs.example:601 or tls://logs.example")
	}
	s := &Sink{network: u.Scheme, tls: u.Scheme == "tls", format: format}
	port := map[string]string{"udp": "514", "tcp": "601", "tls": "6514"}[u.Scheme] // RFC 5426, 6587, 5425
	if port == "" {
		return nil, fmt.Errorf("%q is none of udp, tcp, tls", u.Scheme)
	}
	if u.Port() != "" {
		port = u.Port()
	}
	if s.tls {
		s.network = "tcp"
	}
	s.address = net.JoinHostPort(u.Hostname(), port)
	if s.host, err = os.Hostname(); err != nil || s.host == "" {
		s.host = "-"
	}
	return s, nil
}

// Send implements notify.Sink. Over UDP nobody says whether it arrived.
func (s *Sink) Send(ctx context.Context, m notify.Message) (err error) {
	var frames []byte
	var packets [][]byte
	for _, i := range m.Items {
		line, err := s.line(m, i)
		if err != nil {
			return err
		}
		packets = append(packets, line)
		frames = append(frames, fmt.Sprintf("%d %s", len(line), line)...) // RFC 6587, 3.4.1
	}
	var conn net.Conn
	if s.tls {
		conn, err = new(tls.Dialer).DialContext(ctx, s.network, s.address)
	} else {
		conn, err = new(net.Dialer).DialContext(ctx, s.network, s.address)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return err
		}
	}
	if s.network == "udp" {
		for _, p := range packets {
			if _, err := conn.Write(p); err != nil {
				return err
			}
		}
		return nil
	}
	_, err = conn.Write(frames)
	return err
}

// levels are the severities of RFC 5424, 6.2.1; facility is log audit.
var levels = map[audit.Severity]int{audit.Info: 6, audit.Notice: 5, audit.Warning: 4, audit.High: 3, audit.Critical: 2}

const facility = 13

// line is one message.
func (s *Sink) line(m notify.Message, i notify.Item) ([]byte, error) {
	text, err := s.text(m, i)
	if err != nil {
		return nil, err
	}
	e := i.Event
	head := fmt.Sprintf("<%d>1 %s %s tidemark - %s - ", facility*8+levels[e.Severity()], e.Time.UTC().Format("2006-01-02T15:04:05.000Z"), s.host, e.Type)
	return append([]byte(head), text...), nil
}

func (s *Sink) text(m notify.Message, i notify.Item) ([]byte, error) {
	switch s.format {
	case CEF:
		return []byte(cef(i)), nil
	case ECS:
		return json.Marshal(ecs(m, i))
	case OCSF:
		return json.Marshal(ocsf(m, i))
	}
	return json.Marshal(i.CloudEvent(m.Origin))
}

var (
	cefHead  = strings.NewReplacer(`\`, `\\`, `|`, `\|`, "\n", " ", "\r", " ")
	cefValue = strings.NewReplacer(`\`, `\\`, `=`, `\=`, "\n", `\n`, "\r", `\r`)
	cefLevel = map[audit.Severity]int{audit.Info: 1, audit.Notice: 3, audit.Warning: 5, audit.High: 8, audit.Critical: 10}
)

func cef(i notify.Item) string {
	e := i.Event
	var b strings.Builder
	fmt.Fprintf(&b, "CEF:0|tidemark|tidemark|1|%s|%s|%d|", e.Type, cefHead.Replace(title(i)), cefLevel[e.Severity()])
	fmt.Fprintf(&b, "rt=%d externalId=%s cnt=1", e.Time.UnixMilli(), e.ID)
	for _, f := range []struct{ key, label, value string }{
		{"cs1", "ref", refOf(e)}, {"cs2", "old", digestOf(e.Old)}, {"cs3", "new", digestOf(e.New)},
		{"cs4", "class", string(e.Class)}, {"cs5", "signals", strings.Join(e.Signals, ",")}, {"cs6", "served", e.Policy.Served.String()},
	} {
		if f.value != "" {
			fmt.Fprintf(&b, " %sLabel=%s %s=%s", f.key, f.label, f.key, cefValue.Replace(f.value))
		}
	}
	return b.String()
}

func title(i notify.Item) string { return notify.Message{Items: []notify.Item{i}}.Title() }

func refOf(e audit.Event) string {
	if e.Ref == (audit.Ref{}) {
		return ""
	}
	return e.Ref.String()
}

func digestOf(c *audit.Content) string {
	if c == nil {
		return ""
	}
	return c.Digest.String()
}

type object map[string]any

func ecs(m notify.Message, i notify.Item) object {
	e := i.Event
	o := object{
		"@timestamp": e.Time.UTC().Format(time.RFC3339Nano), "ecs": object{"version": "8.11.0"}, "message": title(i),
		"event":    object{"kind": "alert", "category": []string{"configuration"}, "type": []string{"change"}, "action": string(e.Type), "id": e.ID.String(), "sequence": i.Index, "severity": int(e.Severity()), "provider": "tidemark", "dataset": m.Origin},
		"log":      object{"level": e.Severity().String()},
		"tidemark": json.RawMessage(i.Leaf),
	}
	if e.Ref != (audit.Ref{}) {
		image := object{"name": e.Ref.Upstream + "/" + e.Ref.Repository, "tag": []string{e.Ref.Tag}}
		if e.New != nil {
			image["hash"] = object{"all": []string{e.New.Digest.String()}}
		}
		o["container"] = object{"image": image}
	}
	return o
}

var ocsfLevel = map[audit.Severity]int{audit.Info: 1, audit.Notice: 2, audit.Warning: 3, audit.High: 4, audit.Critical: 5}

func ocsf(m notify.Message, i notify.Item) object {
	e := i.Event
	o := object{
		"class_uid": 2004, "category_uid": 2, "activity_id": 1, "type_uid": 200401, "time": e.Time.UnixMilli(), "severity_id": ocsfLevel[e.Severity()], "status_id": 1,
		"message":      title(i),
		"metadata":     object{"version": "1.3.0", "uid": e.ID.String(), "sequence": i.Index, "log_name": m.Origin, "product": object{"name": "tidemark", "vendor_name": "tidemark"}},
		"finding_info": object{"uid": e.ID.String(), "title": title(i), "types": []string{string(e.Type)}, "created_time": e.Time.UnixMilli()},
		"unmapped":     json.RawMessage(i.Leaf),
	}
	if r := refOf(e); r != "" {
		resource := object{"name": r, "type": "container image"}
		if e.New != nil {
			resource["uid"] = e.New.Digest.String()
		}
		o["resources"] = []object{resource}
	}
	return o
}
