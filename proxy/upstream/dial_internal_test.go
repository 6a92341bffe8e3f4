package upstream

import (
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"
)

// Every address that is not on the open internet is known as what it is, also
// when it is written as IPv6.
func TestPlaces(t *testing.T) {
	for addr, want := range map[string]place{
		"93.184.215.14":          0,
		"2606:2800:220:1::1":     0,
		"::ffff:93.184.215.14":   0,
		"100.63.255.255":         0,
		"100.128.0.0":            0,
		"172.32.0.1":             0,
		"127.0.0.1":              loopback,
		"127.255.255.254":        loopback,
		"::1":                    loopback,
		"::ffff:127.0.0.1":       loopback,
		"10.0.0.1":               private,
		"172.16.0.1":             private,
		"172.31.255.255":         private,
		"192.168.1.1":            private,
		"100.64.0.1":             private,
		"100.127.255.255":        private,
		"fd12:3456::1":           private,
		"::ffff:10.0.0.1":        private,
		"169.254.169.254":        linkLocal,
		"fe80::1":                linkLocal,
		"fe80::1%eth0":           linkLocal,
		"::ffff:169.254.169.254": linkLocal,
		"0.0.0.0":                nowhere,
		"::":                     nowhere,
		"224.0.0.1":              nowhere,
		"ff02::1":                nowhere,
	} {
		if got := placeOf(netip.MustParseAddr(addr)); got != want {
			t.Errorf("place of %s = %b, want %b", addr, got, want)
		}
	}
	if got := placeOf(netip.Addr{}); got != nowhere {
		t.Errorf("place of no address = %b, want nowhere", got)
	}
}

// An answer may lead to the open internet from anywhere, and into a network
// that is not public only if upstream was found in one of the same kind.
func TestAnswersLeadOnlyWhereUpstreamIs(t *testing.T) {
	const public, local, inside, link = "93.184.215.14", "127.0.0.1", "10.0.0.1", "169.254.169.254"
	for _, c := range []struct {
		name    string
		home    place
		allowed []string
		refused []string
	}{
		{"public upstream", 0, []string{public}, []string{local, inside, link, "0.0.0.0"}},
		{"on loopback", loopback, []string{public, local}, []string{inside, link, "0.0.0.0"}},
		{"in a private network", private, []string{public, inside}, []string{local, link, "0.0.0.0"}},
		{"in two", private | loopback, []string{public, inside, local}, []string{link, "0.0.0.0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var d dialer
			d.home.Store(uint32(c.home))
			redirect := func(addr string) error {
				return d.checkRedirect(&http.Request{URL: &url.URL{Scheme: "https", Host: addr}}, []*http.Request{{URL: &url.URL{Scheme: "https", Host: "hub.example"}}})
			}
			for _, addr := range c.allowed {
				if err := errors.Join(d.allowed(netip.MustParseAddr(addr), addr), redirect(addr)); err != nil {
					t.Errorf("%s is refused: %v", addr, err)
				}
			}
			for _, addr := range c.refused {
				for _, err := range []error{d.allowed(netip.MustParseAddr(addr), addr), redirect(addr), redirect(addr + ":443")} {
					var e *Error
					if !errors.As(err, &e) || !e.Nonsense || !strings.Contains(e.Err.Error(), "leads to "+addr) {
						t.Errorf("%s: error %v, want nonsense that names it", addr, err)
					}
				}
			}
		})
	}
}

// A name is checked by what it resolves to, before anything is sent there; and
// upstream's own hosts are dialled wherever they are, and remembered.
func TestNameIsCheckedByItsAddress(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	name := net.JoinHostPort("localhost", port)
	d := &dialer{timeout: 5 * time.Second}

	var e *Error
	if _, err := d.foreign(t.Context(), "tcp4", name); !errors.As(err, &e) || !e.Nonsense || !strings.Contains(e.Err.Error(), name+" (127.0.0.1)") {
		t.Fatalf("error = %v, want nonsense that names host and address", err)
	}
	accepted := make(chan net.Conn, 1)
	go func() {
		conn, err := ln.Accept()
		if err == nil {
			accepted <- conn
		}
	}()
	own, err := d.own(t.Context(), "tcp4", name)
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	// The first connection to arrive is our own: nothing was dialled before it.
	first := <-accepted
	defer first.Close()
	if first.RemoteAddr().String() != own.LocalAddr().String() {
		t.Errorf("the first connection is from %s, want %s: a refused one was dialled", first.RemoteAddr(), own.LocalAddr())
	}
	if got := place(d.home.Load()); got != loopback {
		t.Errorf("upstream's place = %b, want loopback", got)
	}
	conn, err := d.foreign(t.Context(), "tcp4", name)
	if err != nil {
		t.Fatalf("where upstream itself is: %v", err)
	}
	conn.Close()
}

// An upstream that redirects into our network, where it is not itself, is told
// as nonsense, by name or by address, and without the signature.
func TestRedirectIntoOurNetworkIsNonsense(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	for _, host := range []string{"localhost", "127.0.0.1", "169.254.169.254", "10.0.0.1"} {
		u := newUpstream(nil)
		auth := u.client.Transport.(*authTransport)
		auth.foreign = newTransport((&dialer{timeout: 5 * time.Second}).foreign, nil, Options{}, 0)
		auth.own = served{http.RedirectHandler("https://"+net.JoinHostPort(host, port)+"/blob?signature=secret-signature", http.StatusFound)}

		_, err := u.GetManifest(t.Context(), "app", "1")
		var e *Error
		if !errors.As(err, &e) || !e.Nonsense || !strings.Contains(err.Error(), "a private network in which the upstream itself is not") {
			t.Errorf("redirect to %s: %v, want nonsense about a private network", host, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret-signature") {
			t.Errorf("error text %q contains the signature", err)
		}
	}
}
