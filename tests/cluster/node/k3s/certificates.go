package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	day = 24 * time.Hour
	// k3s makes a certificate anew, at a start, that has less than this left.
	renewBefore = 120 * day
)

// authority is a certificate authority, kept as NAME.crt and NAME.key.
type authority struct {
	file        string
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// subject is what a certificate says of its holder.
type subject struct {
	name, organization string
	hosts              []string
}

// open reads an authority, and makes it where it is absent.
func open(file, name string) (*authority, error) {
	if _, err := os.Stat(file + ".crt"); err == nil {
		certificate, key, err := load(file)
		return &authority{file, certificate, key}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(0),
		Subject:               pkix.Name{CommonName: fmt.Sprintf("%s@%d", name, now.Unix())},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(3650 * day),
		KeyUsage:              x509.KeyUsageKeyEncipherment | x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	if err := sign(file, template, template, key, key); err != nil {
		return nil, err
	}
	certificate, key, err := load(file)
	return &authority{file, certificate, key}, err
}

// issue makes a certificate for a server and client unless there is one that will do.
func (a *authority) issue(file string, of subject, lifetime time.Duration) error {
	var names []string
	var addresses []net.IP
	for _, host := range of.hosts {
		if ip := net.ParseIP(host); ip != nil {
			addresses = append(addresses, ip)
		} else if !slices.Contains(names, host) {
			names = append(names, host)
		}
	}
	if old, _, err := load(file); err == nil && old.CheckSignatureFrom(a.certificate) == nil &&
		time.Until(old.NotAfter) > renewBefore && covers(old, of.hosts) {
		return nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 63))
	if err != nil {
		return err
	}
	name := pkix.Name{CommonName: of.name}
	if of.organization != "" {
		name.Organization = []string{of.organization}
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      name,
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(lifetime),
		KeyUsage:     x509.KeyUsageKeyEncipherment | x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:     names,
		IPAddresses:  addresses,
	}
	return sign(file, template, a.certificate, key, a.key)
}

func covers(certificate *x509.Certificate, hosts []string) bool {
	for _, host := range hosts {
		if certificate.VerifyHostname(host) != nil {
			return false
		}
	}
	return true
}

func sign(file string, template, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) error {
	certificate, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		return err
	}
	if err := writeKey(file+".key", key); err != nil {
		return err
	}
	return os.WriteFile(file+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}), 0o644)
}

func writeKey(file string, key *ecdsa.PrivateKey) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

func load(file string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	blocks := map[string][]byte{}
	for _, suffix := range []string{".crt", ".key"} {
		content, err := os.ReadFile(file + suffix)
		if err != nil {
			return nil, nil, err
		}
		block, _ := pem.Decode(content)
		if block == nil {
			return nil, nil, fmt.Errorf("%s%s holds no PEM", file, suffix)
		}
		blocks[suffix] = block.Bytes
	}
	certificate, err := x509.ParseCertificate(blocks[".crt"])
	if err != nil {
		return nil, nil, fmt.Errorf("%s.crt: %w", file, err)
	}
	key, err := x509.ParseECPrivateKey(blocks[".key"])
	if err != nil {
		return nil, nil, fmt.Errorf("%s.key: %w", file, err)
	}
	return certificate, key, nil
}
