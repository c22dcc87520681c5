package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// openingFile is how a test slows down or stalls the opening of the datastore.
const openingFile = "/etc/rancher/k3s/opening.json"

// opening says how long the datastore takes to open, and how long certificates live.
type opening struct {
	// MiB to read before the datastore opens, as a large one makes SQLite do.
	MiB int64 `json:"mib"`
	// MiBPerSecond bounds the reading; 0 is as fast as it goes.
	MiBPerSecond int64 `json:"mibPerSecond"`
	// Stalls is the number of starts, this one included, that read nothing and never open it.
	Stalls int `json:"stalls"`
	// CertificateDays is how long certificates live that are issued at this start.
	CertificateDays int `json:"certificateDays"`
}

func readOpening() opening {
	o := opening{CertificateDays: 365}
	if content, err := os.ReadFile(openingFile); err == nil {
		if err := json.Unmarshal(content, &o); err != nil {
			say("error", "%s: %v", openingFile, err)
		}
	}
	return o
}

// open takes as long as it is told, by really reading.
func (o opening) open(ctx context.Context) error {
	if o.Stalls > 0 {
		left := o
		left.Stalls--
		content, _ := json.Marshal(left)
		if err := os.WriteFile(openingFile, content, 0o644); err != nil {
			return err
		}
		say("info", "The datastore's opening stalls")
		<-ctx.Done()
		return ctx.Err()
	}
	if o.MiB == 0 {
		return nil
	}
	say("info", "Opening the datastore: %d MiB to read", o.MiB)
	zeros, err := os.Open("/dev/zero")
	if err != nil {
		return err
	}
	defer zeros.Close()
	for read := int64(0); read < o.MiB; read++ {
		if _, err := io.CopyN(io.Discard, struct{ io.Reader }{zeros}, 1<<20); err != nil {
			return err
		}
		if o.MiBPerSecond > 0 {
			if err := pause(ctx, time.Second/time.Duration(o.MiBPerSecond)); err != nil {
				return err
			}
		}
	}
	return nil
}

// startDatastore starts SQLite behind kine, or etcd, and returns the API server's arguments for it.
func (s *server) startDatastore(ctx context.Context, running *processes) ([]string, error) {
	if s.several() {
		return s.startEtcd(ctx, running)
	}
	if err := s.startKine(ctx, running); err != nil {
		return nil, err
	}
	return []string{"--etcd-servers=unix://" + filepath.Join(s.dir, "kine.sock")}, nil
}

// startKine starts SQLite behind kine and waits for it.
func (s *server) startKine(ctx context.Context, running *processes) error {
	database := filepath.Join(s.dir, "db", "state.db")
	if err := os.MkdirAll(filepath.Dir(database), 0o700); err != nil {
		return err
	}
	socket := filepath.Join(s.dir, "kine.sock")
	os.Remove(socket)
	settings := "?_journal=WAL&cache=shared&_busy_timeout=30000&_txlock=immediate"
	if err := running.start("kine", "--endpoint=sqlite://"+database+settings,
		"--listen-address=unix://"+socket, "--metrics-bind-address=0"); err != nil {
		return err
	}
	for !exists(socket) {
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

func (s *server) startEtcd(ctx context.Context, running *processes) ([]string, error) {
	data := filepath.Join(s.dir, "db", "etcd")
	if exists(filepath.Join(data, tombstone)) {
		if s.url == "" {
			return nil, errors.New("tombstone file has been detected but --server is empty")
		}
		say("info", "tombstone file has been detected, removing data dir to rejoin the cluster")
		if err := os.RemoveAll(data); err != nil {
			return nil, err
		}
	}
	var migrated map[string][]byte
	if s.url == "" && !s.clusterReset && !exists(filepath.Join(data, "member")) {
		var err error
		if migrated, err = s.readSQLite(ctx); err != nil {
			return nil, err
		}
	}
	name := s.nodeName
	peer := "https://" + s.address + ":2380"
	cluster, state := name+"="+peer, "new"
	if s.url != "" && !exists(filepath.Join(data, "member")) {
		members, err := s.addMember(ctx, peer)
		if err != nil {
			return nil, err
		}
		for i, one := range members {
			if strings.HasPrefix(one, "=") {
				members[i] = name + one
			}
		}
		cluster, state = strings.Join(members, ","), "existing"
	}
	t := s.tls + "/etcd/"
	arguments := []string{
		"--name=" + name, "--data-dir=" + data, "--log-level=warn",
		"--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer,
		"--listen-client-urls=https://127.0.0.1:2379,https://" + s.address + ":2379",
		"--advertise-client-urls=https://" + s.address + ":2379",
		"--initial-cluster=" + cluster, "--initial-cluster-state=" + state,
		"--cert-file=" + t + "server-client.crt", "--key-file=" + t + "server-client.key",
		"--client-cert-auth", "--trusted-ca-file=" + t + "server-ca.crt",
		"--peer-cert-file=" + t + "peer-server-client.crt", "--peer-key-file=" + t + "peer-server-client.key",
		"--peer-client-cert-auth", "--peer-trusted-ca-file=" + t + "peer-ca.crt",
	}
	if err := running.startInto(epitaph{data}, "etcd", append(arguments, dashed(s.etcdArgs)...)...); err != nil {
		return nil, err
	}
	client, err := s.etcd("https://127.0.0.1:2379")
	if err != nil {
		return nil, err
	}
	defer client.Close()
	for {
		one, cancel := context.WithTimeout(ctx, 3*time.Second)
		_, err := client.Get(one, "quorum")
		cancel()
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		say("info", "Waiting for etcd: %v", err)
		if err := pause(ctx, 500*time.Millisecond); err != nil {
			return nil, err
		}
	}
	if migrated != nil {
		if err := writeAll(ctx, client, migrated); err != nil {
			return nil, err
		}
		database := filepath.Join(s.dir, "db", "state.db")
		if err := os.Rename(database, database+".migrated"); err != nil {
			return nil, err
		}
	}
	if !s.clusterReset {
		if err := s.checkSeal(ctx, client); err != nil {
			return nil, err
		}
	}
	return []string{
		"--etcd-servers=https://127.0.0.1:2379", "--etcd-cafile=" + t + "server-ca.crt",
		"--etcd-certfile=" + t + "server-client.crt", "--etcd-keyfile=" + t + "server-client.key",
	}, nil
}

// tombstone is in the data of a member that the others have removed. A k3s that is started after that
// joins anew, if it was told whom (k3s issues 2527, 4023, 13623).
const tombstone = "tombstone"

// epitaph passes on what etcd says, and writes the tombstone.
type epitaph struct{ data string }

func (e epitaph) Write(text []byte) (int, error) {
	if bytes.Contains(text, []byte("the member has been permanently removed from the cluster")) {
		if err := os.WriteFile(filepath.Join(e.data, tombstone), nil, 0o600); err != nil {
			return 0, err
		}
	}
	return os.Stderr.Write(text)
}

// addMember makes this node known to the others; the answer is the list of all as NAME=URL, with an
// empty name for one that has not started yet.
func (s *server) addMember(ctx context.Context, peer string) ([]string, error) {
	first, err := url.Parse(s.url)
	if err != nil {
		return nil, err
	}
	client, err := s.etcd("https://" + first.Hostname() + ":2379")
	if err != nil {
		return nil, err
	}
	defer client.Close()
	for {
		one, cancel := context.WithTimeout(ctx, 5*time.Second)
		listed, err := client.MemberList(one)
		if err == nil {
			known := false
			for _, member := range listed.Members {
				known = known || (len(member.PeerURLs) > 0 && member.PeerURLs[0] == peer)
			}
			members := listed.Members
			if !known {
				var added *clientv3.MemberAddResponse
				if added, err = client.MemberAdd(one, []string{peer}); err == nil {
					members = added.Members
				}
			}
			if err == nil {
				cancel()
				var all []string
				for _, member := range members {
					all = append(all, fmt.Sprintf("%s=%s", member.Name, member.PeerURLs[0]))
				}
				return all, nil
			}
		}
		cancel()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		say("info", "Waiting for other members to finish joining etcd cluster: %v", err)
		if err := pause(ctx, time.Second); err != nil {
			return nil, err
		}
	}
}

func (s *server) etcd(endpoint string) (*clientv3.Client, error) {
	t := s.tls + "/etcd/"
	certificate, err := tls.LoadX509KeyPair(t+"server-client.crt", t+"server-client.key")
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(mustRead(t + "server-ca.crt"))
	return clientv3.New(clientv3.Config{
		Endpoints:   []string{endpoint},
		DialTimeout: 5 * time.Second,
		TLS:         &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{certificate}},
	})
}
