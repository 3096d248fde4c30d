// SPDX-License-Identifier: MPL-2.0
// Certificates as node-triton makes them, by the same library: npm install sshpk; node sshpk.js
const fs = require('fs');
const sshpk = require('sshpk');

const key = (name) => sshpk.parsePrivateKey(fs.readFileSync(`${__dirname}/${name}.key`), 'pem');
const dates = { validFrom: new Date('2020-01-01'), validUntil: new Date('2119-01-01') };
const subject = sshpk.identityFromDN('CN=alice');
const write = (name, certificate) =>
    fs.writeFileSync(`${__dirname}/sshpk_${name}.pem`, certificate.toBuffer('pem'));

for (const name of ['rsa', 'ec']) {             // the account's own key
    write(`old_${name}`, sshpk.createSelfSignedCertificate([subject], key(name), dates));
}
for (const name of ['rsa', 'ec', 'ec384']) {    // a key of its own, signed by the account's
    const signer = key(name);
    const md5 = signer.fingerprint('md5').hash.toString('base64').replace(/=+$/, '');
    write(`new_${name}`, sshpk.createCertificate([subject], key('client'),
        sshpk.identityFromDN(`CN=MD5:${md5}`), signer,
        { ...dates, purposes: ['clientAuth', 'joyentCmon'] }));
}
